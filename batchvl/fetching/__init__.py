"""Fetching of web images: a scheduler of hosts, and the policy of which addresses a URL may lead to."""
