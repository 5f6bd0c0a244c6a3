from frontend import browser, visit  # noqa: F401 (fixtures)
