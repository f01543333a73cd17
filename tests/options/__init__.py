"""Tests of the table of options."""
