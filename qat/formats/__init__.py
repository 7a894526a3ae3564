"""Formats: one file each, from and to QuantizedModel."""
