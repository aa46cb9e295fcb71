"""Stages index-pool and retrieve-class-images: class images for prior preservation."""
