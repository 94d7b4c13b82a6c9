"""What tests share: small parts of every kind, data of every format, and scripts that run as processes of their own."""
