"""Placeholder during bring-up."""
