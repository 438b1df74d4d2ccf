"""Tests of cloud_server."""
