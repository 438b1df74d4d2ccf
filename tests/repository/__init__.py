"""Tests of the repository: what is packaged, and what importing costs."""
