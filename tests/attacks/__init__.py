"""What somebody who means harm can send, and what must come of it."""
