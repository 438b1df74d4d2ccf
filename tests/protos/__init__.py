"""Tests of the .proto files and their generated code."""
