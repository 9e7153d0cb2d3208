"""From models to Programs, and back to the user's own modules."""
