"""Command-line programs: run them by path, or by name through the fastdcd command. Nothing imports them."""
