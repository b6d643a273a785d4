"""Operations that training computes itself, each in one differentiable step."""
