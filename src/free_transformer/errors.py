"""What a person can put right."""


class SettingsError(ValueError):
    """Settings that cannot be used; the message says which, what is allowed and what to do."""
