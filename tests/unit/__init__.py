"""Tests of single modules; none needs a server."""
