"""Pictures: from what users give to the input of a network, and a picture under its map."""
