"""Local training: the user's text as token blocks, and the steps that learn from them within a device's budget."""
