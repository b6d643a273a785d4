"""Finds the files of a data set and reads their rows."""
