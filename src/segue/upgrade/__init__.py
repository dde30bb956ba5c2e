"""Replacing an instance: plan, transaction, journal, receipt."""
