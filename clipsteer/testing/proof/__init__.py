"""Proof of anybody's kernel against its plain definition, by bounds that nobody has to derive."""
