"""What a server lets see of itself."""
