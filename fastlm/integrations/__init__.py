"""fastlm in models of other libraries. api.py has the public functions."""
