"""The edge daemon: decides where a prompt becomes an image, and makes it here unless the cloud is worth it."""
