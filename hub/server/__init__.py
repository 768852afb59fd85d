"""The server: the Hub's protocol, and Xet's, over the registry in a folder."""
