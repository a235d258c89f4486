"""What one step does, and everything between a request and its tokens; sessions and branches on top of it."""
