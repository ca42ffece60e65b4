"""Out of the door: export, quantisation, HTTP, a demo page, the Hub."""
