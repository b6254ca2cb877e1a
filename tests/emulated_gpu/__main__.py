from tests.emulated_gpu import main

main()
