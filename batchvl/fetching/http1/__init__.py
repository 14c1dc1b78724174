"""An HTTP/1.1 client for images: requests as written, strict about where a response ends, lenient about the rest."""
