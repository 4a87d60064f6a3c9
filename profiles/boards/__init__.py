"""Boards: profiles of them, and what this machine is and has."""
