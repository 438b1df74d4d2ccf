"""Tests of both processes together, on real sockets."""
