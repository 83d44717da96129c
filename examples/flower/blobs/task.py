"""Images of 8x8 pixels in four classes, in parts that differ, and a small network for them."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(6 * 4 * 4, 16)
        self.fc2 = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def load_data(partition_id: int, num_partitions: int, batch_size: int, server_round: int):
    """One partition: part i has 40 + 8 i images, and more of class i than of the others."""
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    draw = torch.Generator().manual_seed(100 + partition_id)
    size = 40 + 8 * partition_id
    labels = torch.randint(0, CLASSES, (size,), generator=draw)
    labels[::3] = partition_id % CLASSES
    images = patterns[labels] + 1.2 * torch.randn(size, 1, 8, 8, generator=draw)
    cut = size * 3 // 4
    order = torch.Generator().manual_seed(1000 * server_round + partition_id)
    trainset, testset = TensorDataset(images[:cut], labels[:cut]), TensorDataset(images[cut:], labels[cut:])
    return DataLoader(trainset, batch_size, shuffle=True, generator=order), DataLoader(testset, batch_size)


def train(net, trainloader, epochs, lr, device):
    net.to(device).train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    running_loss = 0.0
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / (epochs * len(trainloader))


@torch.no_grad()
def test(net, testloader, device):
    net.to(device).eval()
    criterion = nn.CrossEntropyLoss(reduction="sum")
    correct, loss = 0, 0.0
    for images, labels in testloader:
        outputs = net(images.to(device))
        loss += criterion(outputs, labels.to(device)).item()
        correct += (outputs.argmax(1) == labels.to(device)).sum().item()
    return loss / len(testloader.dataset), correct / len(testloader.dataset)
