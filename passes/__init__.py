"""Rewrites of Programs, one file per pass; importance criteria and ranking."""
