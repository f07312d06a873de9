from fastlm.cli import main

main()
