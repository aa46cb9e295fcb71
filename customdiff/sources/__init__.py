"""Stage download-data: instance images from folders, archives, the web and the Hub."""
