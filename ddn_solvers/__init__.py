"""Stub until the public names stand."""
