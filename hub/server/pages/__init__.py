"""What a browser is shown: pages rendered on the server, which work without JavaScript."""
