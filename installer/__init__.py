"""Installer of the environments in which dev.py runs its commands. Standard library only."""
