"""Sampling chooses the next token from logits, under the settings and constraints of a request."""
