"""What outlives an instance, one module a kind."""
