"""Stages of verification that run the artifact."""
