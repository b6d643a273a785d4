"""How many new jobs a second the operator starts, and what that costs."""
