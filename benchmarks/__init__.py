"""Measures the trainer: speed and memory beside what people use today, the loop's own cost, where the time goes."""
