"""Who somebody is, and what that permits: users, roles, keys, sessions."""
