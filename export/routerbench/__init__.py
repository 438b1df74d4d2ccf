"""The open benchmark of routers for text-to-image: `edge-export routerbench`, from the shipped outcome matrix."""
