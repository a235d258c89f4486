"""Matrices in the forms that they are multiplied in."""
