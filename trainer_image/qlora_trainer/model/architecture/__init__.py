"""The parts of a model of any family, and how transformers and PEFT name them."""
