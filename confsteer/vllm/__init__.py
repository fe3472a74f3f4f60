"""Steering inside vLLM."""
