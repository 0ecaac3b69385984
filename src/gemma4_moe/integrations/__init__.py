"""Hooks into other frameworks. Each module names one; none is imported before it is asked for."""
