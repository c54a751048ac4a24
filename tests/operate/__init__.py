"""Whole servers under faults and load, as operators meet them."""
