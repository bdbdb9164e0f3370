"""Runs the CPU library under AddressSanitizer, UBSan and ThreadSanitizer: `make sanitize`."""
