"""Saved JSON -> graph -> execution."""
