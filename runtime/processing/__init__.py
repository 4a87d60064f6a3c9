"""From prompt, images and videos to a request: ids and pixels."""
