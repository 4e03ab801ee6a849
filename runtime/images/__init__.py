"""Pictures: makes a network's input of a user's images, and draws maps over pictures."""
