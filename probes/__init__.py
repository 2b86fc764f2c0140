"""Measurements on any hooked model, through its protocol."""
