"""Integrations: one room a framework, each importing its framework only when it is itself imported."""
